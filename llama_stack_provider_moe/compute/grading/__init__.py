"""Graders that need torch, and a job's rewards: what recipes and `moe-train grade` open. `graders` has all else.

opening         the rewards of a job, ready inside a `with`
reward_model    a sequence classifier
monitor         a probe
refusal_model   a model that is asked whether an answer refuses
conversations   an answer and its row as a conversation
command         `moe-train grade`, and a server's tries of graders, where torch is needed
"""
