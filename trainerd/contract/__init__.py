"""What client and daemon agree on: status, requests, paths, files, locks, errors. Standard library only."""
