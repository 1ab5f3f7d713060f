# FastGen's three stages at toy size: ODE pairs of prompts alone, CausalKD, the bridge, Self-Forcing; then a clip four times as long.
export OUTPUT_ROOT=out
printf 'a red square moves slowly to the left\na blue dot moves to the right\na green square moves up\n' > prompts.txt
# 1: scripts/generate_ode_pairs.py
fewstep pairs $TEACHER --prompts prompts.txt --out ODE_PAIRS/toy --num-frames 9 --height 32 --width 32 --steps 8 \
  --sampler unipc --shift 5 --guidance 3.0 --path-times 0.999,0.937,0.833,0.624
# 2: train.py --config=.../config_kd_causal.py
fewstep train experiment=causal_kd teacher=$TEACHER data.dataset_dir=ODE_PAIRS/toy chunk=1 span=3 \
  method.t_list=0.999,0.937,0.833,0.624 trainer.max_iter=2 trainer.batch_size=2 job.name=kd
# the bridge: scripts/extract_net_weights.py (networks.student.init=RUN needs none)
fewstep export out/general/$NAME/kd --out ode_init
# 3: train.py --config=.../config_sf.py
fewstep train experiment=self_forcing teacher=$TEACHER data.dataset_dir=ODE_PAIRS/toy chunk=1 span=3 guidance=3.0 \
  method.student.t_list=0.999,0.937,0.833,0.624 networks.student.init=ode_init/student.safetensors data.negative=zeros \
  trainer.max_iter=2 trainer.batch_size=2 job.name=sf
fewstep export out/general/$NAME/sf --out student
fewstep generate student --codec $TEACHER --text-encoder $TEACHER --out clips --prompt "a red square moves up" --num-frames 33 \
  --height 32 --width 32 --quality lossless
fewstep generate student --codec $TEACHER --text-encoder $TEACHER --out streamed --prompt "a red square moves up" --num-frames 33 \
  --height 32 --width 32 --quality lossless --stream
fewstep generate student --codec $TEACHER --text-encoder $TEACHER --out switched --prompt "a red square moves up" --num-frames 33 \
  --height 32 --width 32 --quality lossless --stream --switch-at 17:"a blue dot moves slowly to the left"
