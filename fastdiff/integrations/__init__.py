"""fastdiff where people already are: adapters to other libraries, each imported only by name."""
