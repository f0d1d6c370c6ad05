"""Translation validation: what a verb made is run beside the model before it is handed out."""
