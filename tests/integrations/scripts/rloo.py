from datasets import load_dataset
from rewards_of_mine import right
from trl import RLOOConfig, RLOOTrainer

if __name__ == "__main__":
    args = RLOOConfig(
        output_dir="rloo/out",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_generations=4,
        beta=0.02,
        epsilon_high=0.3,
        learning_rate=5e-6,
        max_completion_length=16,
    )
    dataset = load_dataset("json", data_files="plain.jsonl", split="train")
    RLOOTrainer("./model", reward_funcs=right, args=args, train_dataset=dataset).train()
