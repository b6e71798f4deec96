"""Where tokens and tensors live: dispatch of tokens to experts, and (under torchrun) layouts over processes."""
