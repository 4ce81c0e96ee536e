"""How findings reach people."""
