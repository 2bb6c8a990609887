"""What any measurement needs: intervals, paired timing, files that survive kills, provenance. It knows no agent."""
