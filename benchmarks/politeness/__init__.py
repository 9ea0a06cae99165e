"""What training in the background costs the person at the keyboard."""
