"""`camserve bulk`: many images to a folder of Parquet files and pictures, here or on Ray."""
