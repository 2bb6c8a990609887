"""What the loss is made of beside corrections: rewards, advantages, aggregation, anchors, the consistency loss."""
