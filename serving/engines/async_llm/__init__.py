"""vLLM's AsyncLLM as a ServingEngine: capture, versions and swaps live in its worker; needs `.venv-vllm`."""
