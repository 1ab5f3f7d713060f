# Post-training Cosmos-Predict1 7B Video2World, all weights and with adapters: from clips to videos from an image and from a video.
# Beside the clips there are the download of its weights, a T5, a tokenizer, and full.yaml and lora.yaml with the sizes of this
# network.
export OUTPUT_ROOT=checkpoints

# One caption for all clips, its embedding, and the latents of windows.
fewstep prepare text datasets/cosmos_nemo_assets --text-encoder google-t5/t5-11b --prompt "a red ball rolls"
fewstep prepare latents datasets/cosmos_nemo_assets --codec checkpoints/tokenizer --scale 0.5 --num-frames 17 \
  --start-frame-interval 4 --height 32 --width 32
fewstep check data datasets/cosmos_nemo_assets data.x0=latents data.negative=zeros

# All weights, and the moving average of the second iteration in the place of a published model.
torchrun --nproc_per_node=2 -m fewstep.train --config=cosmos_predict1/diffusion/training/config/config.py -- \
  experiment=video2world_7b_example_cosmos_nemo_assets full.yaml
mkdir -p checkpoints/Cosmos-Predict1-7B-Video2World_post-trained/
cp checkpoints/posttraining/diffusion_video2world/video2world_7b_example_cosmos_nemo_assets/checkpoints/iter_000000002_ema_model.pt checkpoints/Cosmos-Predict1-7B-Video2World_post-trained/model.pt

# From an image, by one process, and from nine frames.
fewstep generate --checkpoint_dir checkpoints --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World_post-trained \
  --input_image_or_video_path assets/diffusion/video2world_input0.png --num_input_frames 1 --offload_prompt_upsampler \
  --video_save_name diffusion-video2world-7b-post-trained \
  --prompt "a red ball rolls" --tokenizer_dir tokenizer --text-encoder google-t5/t5-11b $SHOT
fewstep generate --checkpoint_dir checkpoints --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World_post-trained \
  --input_image_or_video_path datasets/cosmos_nemo_assets/videos/1.mp4 --num_input_frames 9 --offload_prompt_upsampler \
  --video_save_name nine-frames --save_input_noise \
  --prompt "a red ball rolls" --tokenizer_dir tokenizer --text-encoder google-t5/t5-11b $SHOT

# Adapters, merged into the base.
torchrun --nproc_per_node=2 -m fewstep.train --config=cosmos_predict1/diffusion/training/config/config.py -- \
  experiment=video2world_7b_lora_example_cosmos_nemo_assets lora.yaml
mkdir -p checkpoints/Cosmos-Predict1-7B-Video2World_post-trained-lora/
cp checkpoints/posttraining/diffusion_video2world/video2world_7b_lora_example_cosmos_nemo_assets/checkpoints/iter_000000002_model.pt checkpoints/Cosmos-Predict1-7B-Video2World_post-trained-lora/model.pt

# Several processes: the frames of one.
torchrun --nproc_per_node=2 -m fewstep generate --num_gpus 2 --checkpoint_dir checkpoints \
  --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World_post-trained-lora \
  --input_image_or_video_path assets/diffusion/video2world_input0.png --num_input_frames 1 --offload_prompt_upsampler \
  --video_save_name diffusion-video2world-7b-post-trained-lora \
  --prompt "a red ball rolls" --tokenizer_dir tokenizer --text-encoder google-t5/t5-11b $SHOT
fewstep generate --checkpoint_dir checkpoints --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World_post-trained-lora \
  --input_image_or_video_path assets/diffusion/video2world_input0.png --num_input_frames 1 --offload_prompt_upsampler \
  --video_save_name alone \
  --prompt "a red ball rolls" --tokenizer_dir tokenizer --text-encoder google-t5/t5-11b $SHOT
