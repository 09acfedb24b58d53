"""What the plugins of inference servers share; imports no server. See docs/serving.md.

Import order: ``layers``, ``placement`` and ``completeness`` <- ``placeholders`` <- ``linear`` <-
``vocabulary`` <- ``config``.
"""
