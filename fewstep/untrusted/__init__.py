"""Readers of files whose content is not trusted: none of them runs what a file says, or believes its sizes.

| file | reads |
|---|---|
| pickles.py | any pickle, opcode by opcode, with the builders that its caller admits |
| arrays.py | the builders of plain data and of numpy arrays |
| torch_files.py | what torch.save writes, by the same reader |
| safe_tensors.py | safetensors |

Text and JSON are read by fewstep/files.py, video and pictures by fewstep/data/files/video.py.
"""
