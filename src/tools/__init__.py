"""Programs that plan a run or use its model. They build on all other folders of src."""
