"""The judgement of label maps: any folder of predictions against its references, and runs against each other."""
