"""Networks: nn.Modules of torch alone, tensors in and tensors out, each with one frozen config."""
