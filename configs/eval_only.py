"""What --eval_only=True sets, after the config and before the command line: no learner, no training data.

python launch.py CONFIG --eval_only=True --model=FOLDER [--eval_data=… --eval_samples=16]
"""

steps = 0
train_data = []
critic_model = ""
eval_every = 1
kl_coef = 0.0
