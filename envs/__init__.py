"""Environments from the literature that no registry ships: importing a module registers its own.

python ppo.py --env-id envs.point_target:PointTarget-v0
"""
