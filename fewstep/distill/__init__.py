"""`fewstep distill`: one command from a teacher and a folder of clips to a student.

request.py   what the command asks for            facts.py   what teacher and clips say, before anything heavy is loaded
road.py      the stages, as public commands       cost.py    their sizes, and the network calls that they take
run.py       checks, runs the stages, judges
stages.py    how a stage runs: printed commands, Ctrl-C, what is done already. The demo uses it, too
"""
