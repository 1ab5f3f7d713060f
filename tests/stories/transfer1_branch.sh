# A control branch of Cosmos-Transfer1, $TYPE, over its frozen base: a fresh one, and the published one trained on.
export OUTPUT_ROOT=checkpoints
fewstep prepare text datasets/dmd2 --text-encoder google-t5/t5-11b
fewstep prepare controls datasets/dmd2 --type $TYPE
fewstep prepare latents datasets/dmd2 --codec checkpoints/tokenizer --control $TYPE --scale 0.5
fewstep convert checkpoints/nvidia/Cosmos-Transfer1-7B/base_model.pt checkpoints/nvidia/Cosmos-Transfer1-7B/base_model
fewstep ls networks
fewstep plan experiment=DISTILL_CTRL_7Bv1_${TYPE}_fsdp_dmd2_train small.yaml gpus=8 \
  'networks.head={kind: conv3d, taps: [1], channels: 24}' shape=2x3x4x4 text=512x8
torchrun --nproc_per_node=1 -m fewstep.train --dryrun --config=cosmos_transfer1/diffusion/config/config_train.py -- \
  experiment=CTRL_7Bv1pt3_lvg_tp_121frames_control_input_${TYPE}_block3_pretrain branch.yaml
torchrun --nproc_per_node=2 -m fewstep.train --config=cosmos_transfer1/diffusion/config/config_train.py -- \
  experiment=CTRL_7Bv1pt3_lvg_tp_121frames_control_input_${TYPE}_block3_pretrain branch.yaml \
  trainer.max_iter=2 checkpoint.save_iter=1
torchrun --nproc_per_node=2 -m fewstep.train --config=cosmos_transfer1/diffusion/config/config_train.py -- \
  experiment=CTRL_7Bv1pt3_lvg_tp_121frames_control_input_${TYPE}_block3_posttrain branch.yaml \
  trainer.max_iter=2 checkpoint.save_iter=1
fewstep generate cosmos_transfer1_posttrain/CTRL_7Bv1_lvg/CTRL_7Bv1pt3_lvg_tp_121frames_control_input_${TYPE}_block3_posttrain \
  --controlnet_specs spec.json --video_save_folder outputs --tokenizer_dir checkpoints/tokenizer \
  --text-encoder google-t5/t5-11b --num-frames 9 --height 16 --width 16 --num-steps 2
