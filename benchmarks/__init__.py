"""Speed beside a peer's, measured in the same run; each module prints one JSON line."""
