"""Expert-parallel MoE layers."""
