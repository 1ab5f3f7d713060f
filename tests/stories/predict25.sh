# Distilling Cosmos-Predict2.5 into four steps with DMD2 in TrigFlow: from clips and captions to a clip of the student.
# Beside the clips there are the download of its weights, a pipeline with codec and text encoder, and small.yaml with the sizes
# of this network.
export OUTPUT_ROOT=checkpoints
fewstep prepare text datasets/dmd2 --text-encoder checkpoints/pipeline --into reason1
fewstep prepare latents datasets/dmd2 --codec checkpoints/pipeline
torchrun --nproc_per_node=2 --master_port=12340 -m fewstep.train \
  --config=cosmos_predict2/_src/predict2/distill/configs/registry_predict2p5.py -- \
  experiment=dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V small.yaml trainer.max_iter=2

# The files of the original tools, and inference with one of them.
fewstep convert cosmos_predict2_distill/predict2_distill/dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V:student converted/model.pt
fewstep convert cosmos_predict2_distill/predict2_distill/dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V:student.ema \
  converted/model_ema_fp32.pt --dtype fp32
fewstep convert cosmos_predict2_distill/predict2_distill/dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V:student.ema \
  converted/model_ema_bf16.pt --dtype bf16
cp checkpoints/network.yaml converted/network.yaml
fewstep generate converted/model_ema_fp32.pt -i inputs/spec.json -o outputs/converted --model=2B/distilled --codec checkpoints/pipeline --text-encoder checkpoints/pipeline \
  --num-frames 9 --height 32 --width 32 --quality lossless

# A folder that plain diffusers opens, and inference with it.
fewstep export cosmos_predict2_distill/predict2_distill/dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V --out student --base checkpoints/pipeline
fewstep generate student -i inputs/spec.json -o outputs --quality lossless
