"""`camserve bulk`: explains many images into a folder of Parquet files, here or on Ray."""
