# Distilling Cosmos-Transfer1 with one control, $TYPE, into one step: from clips and captions to a clip of the student.
# Beside the clips there are the downloads of its weights, a T5, a tokenizer, and small.yaml with the sizes of this network.
export OUTPUT_ROOT=checkpoints

# Text and controls. Edge and vis are made from the clips; the others are results of other models.
fewstep prepare text datasets/dmd2 --text-encoder google-t5/t5-11b
fewstep prepare controls datasets/dmd2 --type $TYPE $FROM
fewstep check data datasets/dmd2 data.control=$TYPE

# Base and control as one teacher; its clips, with the noise and the controls that it received.
fewstep convert --ctrl_type $TYPE
fewstep pairs checkpoints/nvidia/Cosmos-Transfer1-7B/checkpoints_teacher/${TYPE}_control.pt datasets/dmd2 --out datasets/kd \
  --control $TYPE --guidance 8 --codec checkpoints/tokenizer --steps 2

# Knowledge distillation on the teacher's clips.
torchrun --nproc_per_node=1 -m fewstep.train --dryrun --config=cosmos_transfer1/distillation/config/config_ctrl_kd.py -- \
  experiment=DISTILL_CTRL_7Bv1_${TYPE}_fsdp_kd_train small.yaml
torchrun --nproc_per_node=2 -m fewstep.train --config=cosmos_transfer1/distillation/config/config_ctrl_kd.py -- \
  experiment=DISTILL_CTRL_7Bv1_${TYPE}_fsdp_kd_train small.yaml trainer.max_iter=2 checkpoint.save_iter=1

# DMD2 on real clips, from the student of KD.
fewstep prepare latents datasets/dmd2 --codec checkpoints/tokenizer --control $TYPE --scale 0.5
torchrun --nproc_per_node=2 -m fewstep.train --config=cosmos_transfer1/distillation/config/config_ctrl_dmd2.py -- \
  experiment=DISTILL_CTRL_7Bv1_${TYPE}_fsdp_dmd2_train small.yaml trainer.max_iter=2 \
  'networks.head={kind: conv3d, taps: [1], channels: 24}' \
  networks.student.init=cosmos_transfer1_distill/DISTILL_CTRL_7Bv1/DISTILL_CTRL_7Bv1_${TYPE}_fsdp_kd_train

# The original names, and inference in one step.
fewstep export cosmos_transfer1_distill/DISTILL_CTRL_7Bv1/DISTILL_CTRL_7Bv1_${TYPE}_fsdp_dmd2_train --out student
fewstep generate student --controlnet_specs spec.json --use_distilled --video_save_folder outputs --video_save_name $TYPE \
  --tokenizer_dir checkpoints/tokenizer --text-encoder google-t5/t5-11b --quality lossless

# The original commands of inference: of the teacher, and of a distilled model in the place of the published one.
fewstep generate --checkpoint_dir checkpoints --tokenizer_dir tokenizer --controlnet_specs spec.json --num_steps 2 \
  --video_save_folder outputs --video_save_name teacher \
  --text-encoder google-t5/t5-11b --num-frames 9 --height 16 --width 16 --quality lossless
cp student/model.pt checkpoints/nvidia/Cosmos-Transfer1-7B/${TYPE}_control_distilled.pt
fewstep generate --checkpoint_dir checkpoints --tokenizer_dir tokenizer --controlnet_specs spec.json --use_distilled \
  --video_save_folder outputs --video_save_name distilled \
  --text-encoder google-t5/t5-11b --num-frames 9 --height 16 --width 16 --quality lossless
