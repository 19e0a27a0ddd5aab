"""From relevance to a plan: what the budget allows, chosen and priced."""
