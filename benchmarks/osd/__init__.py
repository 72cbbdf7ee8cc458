"""Online distillation measured as the paper measures it: four real domains, a pair trained on them."""
