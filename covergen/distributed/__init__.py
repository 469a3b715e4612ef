"""Processes of one run or command: environment, collectives, heartbeat, interrupts."""
