# Any number of steps: a flow map of a Wan pipeline in two stages, from clips to diffusers' own AnyFlow pipeline.
fewstep prepare text clips --text-encoder teacher
fewstep prepare latents clips --codec teacher
fewstep train experiment=flow_map teacher=teacher data.dataset_dir=clips guidance=1 data.negative=none trainer.max_iter=3 trainer.batch_size=2
fewstep train experiment=flow_map_on_policy teacher=teacher data.dataset_dir=clips guidance=1 data.negative=none trainer.max_iter=2 trainer.batch_size=2 networks.student.init=general/teacher/flow_map
fewstep export general/teacher/flow_map_on_policy --out student --base teacher
fewstep generate student --prompt "a red square moves to the left" --num-steps 3 --num-frames 9 --height 32 --width 32 --seed 4 --save-noise --name three
