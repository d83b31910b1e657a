"""A frozen CLIP: open_clip's models behind a few methods, and a fingerprint of their outputs."""
