"""Pi0 on transformers' own class: flow-matching actions of an expert that attends to a vision-language prefix."""
