"""The same tasks in other engines and servers: their tokens beside the kit's."""
