"""The DeepSeek transformer: latent attention, mixture of experts, multi-token prediction. Nothing asks for a rank."""
