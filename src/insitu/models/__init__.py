"""What experiments are done to: any module, and language models of Hugging Face."""
