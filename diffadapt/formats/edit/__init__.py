"""Files of adapters made from others: resized, combined, extracted."""
