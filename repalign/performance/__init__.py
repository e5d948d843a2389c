"""What a step costs: measured (seconds, operations, memory) and predicted."""
