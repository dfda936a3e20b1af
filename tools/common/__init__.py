"""What several parts of the tools share, and no verb alone."""
