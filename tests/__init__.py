import unclip_pl  # noqa: F401  before a test imports lightning, and with it torchvision
