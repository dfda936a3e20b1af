"""One run of a study: labelled data, methods beside AdaLink, training and scoring."""
