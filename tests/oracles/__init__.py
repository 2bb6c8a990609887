"""References, small worlds and finished runs that several tests share. Nothing here is a test."""
