"""Readers of files whose content is not trusted: none of them runs what a file says, or believes its sizes.

| file | reads |
|---|---|
| text.py | bytes, text and JSON, in the type that is declared for them |
| pickles.py | any pickle, opcode by opcode, with the builders that its caller admits |
| arrays.py | the builders of plain data and of numpy arrays |
| torch_files.py | what torch.save writes, by the same reader |
| safe_tensors.py | safetensors |
| stored.py | nothing yet: a tensor in a file, read when it is asked for; tensors as the bytes of a safetensors file |

Video and pictures are read by fewstep/data/files/video.py. What the package writes, it writes by fewstep/files.py.
"""
