"""What the bytes of a page mean. Torch only: nothing of upstream is imported here."""
