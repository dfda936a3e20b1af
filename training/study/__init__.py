"""Studies of methods: labelled data, methods beside AdaLink, and one run of one of them."""
