"""What is known of model architectures: names of their parts, shapes, and which layers are packed.

Modules are imported one by one: :mod:`.names` and :mod:`.select` need no torch.
"""
