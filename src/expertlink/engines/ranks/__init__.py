"""What ranks say to each other, by way of their hosts."""
