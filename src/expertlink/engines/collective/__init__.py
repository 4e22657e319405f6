"""The engine `collective`: rows move through torch.distributed."""
