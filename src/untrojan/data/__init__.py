"""What goes in: image sets, where they come from, and batched augmentation."""
