"""Networks: nn.Modules that need only torch, from tensors to tensors, each with a frozen config."""
