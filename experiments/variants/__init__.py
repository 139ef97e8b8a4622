"""Algorithms that are a short difference of r1_zero.py, reinforce.py or ppo.py."""
