"""Does learning online pay? Prequential error on drifting streams, beside River's and scikit-learn's learners."""
