import torch
from datasets import load_dataset
from rewards_of_mine import right
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

common = {"num_generations": 2, "per_device_train_batch_size": 8, "max_completion_length": 12}


def main():
    name = "./model"
    model = AutoModelForCausalLM.from_pretrained(name, torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    dataset = load_dataset("json", data_files={"train": "questions.jsonl"}, split="train")
    dataset = dataset.rename_column("question", "prompt").shuffle(seed=3)
    dataset = dataset.select(range(4))
    args = GRPOConfig(output_dir=f"{name}-grpo", beta=0.04, loss_type="grpo", epsilon_high=0.28, **common)
    args.learning_rate = 5e-6
    args.weight_decay = 0.1
    trainer = GRPOTrainer(
        model=model, args=args, processing_class=tokenizer, reward_funcs=[right], train_dataset=dataset
    )
    trainer.train()


if __name__ == "__main__":
    main()
