"""Tokens with known answers: routings drawn or recorded, and what a round trip must add up to."""
