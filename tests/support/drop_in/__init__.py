"""What tests of the drop-in for `deep_ep` share: places where ranks run, inputs, references."""
